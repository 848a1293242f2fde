# One short command each; CI and the README call these. `make help` lists them.
STACK ?= openmmlab

VENV_openmmlab := .venv
VENV_onedl := .venv-onedl
VENV_latest := .venv-latest
VENV := $(VENV_$(STACK))
ifeq ($(VENV),)
$(error STACK=$(STACK) is unknown; it is openmmlab (the default), onedl or latest)
endif
PY := $(VENV)/bin/python
# Programs that a recipe starts (python, torchrun) come from the environment.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-hat-net demo-seg demo-cls demo-cascade \
  demo-panoptic demo-trees demo-nuclei notebook web study study-real \
  bench test test-slow lint format docs docs-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo '  STACK=onedl does the same on the OneDL forks, in .venv-onedl'
	@echo '  STACK=latest does the same on the newest torch, torchvision, NumPy, OpenCV, in .venv-latest'
	@echo '  PYTHON=... and CXX=... name the interpreter and the compiler of the set-up'

# Any python3 can run the set-up, which itself looks for one that suits the environment.
setup: ## set up .venv: checks, packages, mmcv compiled with its operators (once, 5 to 15 minutes)
	@for python in $(PYTHON) python3 python3.12 python3.11; do \
	  if "$$python" -c '' 2>/dev/null; then \
	    exec "$$python" tools/dev/setup_env.py --stack $(STACK) --python "$(PYTHON)"; \
	  fi; \
	done; \
	echo 'python3 is missing. Debian or Ubuntu: apt-get install python3 python3-venv python3-dev' >&2; \
	exit 1

demo: setup ## draw a data set, train Mask R-CNN with a tiny FasterViT on it, show what it learned
	@$(IN_VENV) $(PY) demo/shapes_demo.py --work-dir work_dirs/demo-$(STACK) $(ARGS)

demo-hat-net: setup ## the same with a small HAT-Net
	@$(IN_VENV) $(PY) demo/shapes_demo.py configs/toy/mask-rcnn_hat-net-toy_fpn_shapes.py \
	  --work-dir work_dirs/demo-hat-net-$(STACK) $(ARGS)

demo-seg: setup ## semantic segmentation: UPerNet with a tiny FasterViT
	@$(IN_VENV) $(PY) demo/shapes_demo.py configs/toy/fastervit-tiny_upernet_shapes.py \
	  --work-dir work_dirs/demo-seg-$(STACK) $(ARGS)

demo-cls: setup ## classification with a tiny FasterViT, shows a confusion matrix
	@$(IN_VENV) $(PY) demo/shapes_demo.py configs/toy/fastervit-tiny_shapes.py \
	  --work-dir work_dirs/demo-cls-$(STACK) $(ARGS)

demo-cascade: setup ## instance segmentation: Cascade Mask R-CNN with a tiny FasterViT
	@$(IN_VENV) $(PY) demo/shapes_demo.py configs/toy/cascade-mask-rcnn_fastervit-tiny_fpn_shapes.py \
	  --work-dir work_dirs/demo-cascade-$(STACK) $(ARGS)

demo-panoptic: setup ## panoptic segmentation: Mask2Former with a tiny FasterViT, half an hour
	@$(IN_VENV) $(PY) demo/shapes_demo.py configs/toy/mask2former_fastervit-tiny_shapes-panoptic.py \
	  --work-dir work_dirs/demo-panoptic-$(STACK) $(ARGS)

demo-trees: setup ## real pictures: trees from the air, RetinaNet with a tiny FasterViT
	@$(IN_VENV) bash demo/trees.sh work_dirs/demo-trees-$(STACK)

demo-nuclei: setup ## real pictures: nuclei under the microscope, Mask R-CNN and UPerNet
	@$(IN_VENV) bash demo/nuclei.sh work_dirs/demo-nuclei-$(STACK)

notebook: setup ## run the tutorial, demo/hat_mm_tutorial.ipynb, as a test; installs what notebooks need
	@$(PY) -m pip install --quiet -r requirements/notebook.txt
	@$(IN_VENV) $(PY) -m pytest -m slow tests/test_demo/test_notebook.py $(ARGS)

web: setup ## a page in the browser: what the trained models find, where they look, how fast they are
	@$(IN_VENV) $(PY) -m pip install --quiet -r requirements/web.txt
	@$(IN_VENV) $(PY) demo/web.py $(ARGS)

study: setup ## train networks with and without global attention, 24 runs, over an hour on two cores
	@$(IN_VENV) $(PY) tools/analysis_tools/plugin_study.py $(ARGS)

study-real: setup ## train small networks on real pictures, 36 runs of ten minutes or more, resumable
	@$(IN_VENV) $(PY) tools/analysis_tools/real_study.py --data trees $(ARGS)
	@$(IN_VENV) $(PY) tools/analysis_tools/real_study.py --data nuclei $(ARGS) --backbones \
	  fastervit-toy fastervit-no-carriers-toy swin-toy resnet-wide-toy

bench: setup ## time and memory beside Swin-T, ConvNeXt-T, ResNet-50; 15 minutes on two cores
	@$(IN_VENV) $(PY) tools/analysis_tools/benchmark models --rounds 3 --processes 2 --out work_dirs/benchmark $(ARGS)

# All tests of a file run in one process, because they share fixtures.
test: setup ## run the tests; ARGS='-k word' passes options to pytest
	@$(IN_VENV) $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: setup ## run the long checks that `make test` leaves out
	@$(IN_VENV) $(PY) -m pytest -m slow $(ARGS)

lint: setup ## check format, rules, types, imports between packages, spelling
	@$(IN_VENV) $(PY) -m ruff format --check .
	@$(IN_VENV) $(PY) -m ruff check .
	@$(IN_VENV) $(PY) -m codespell_lib
	@$(IN_VENV) $(PY) -m mypy
	@$(IN_VENV) $(PY) -m pytest -q tests/test_imports.py -k direction

format: setup ## put the code into the format that `make lint` asks for
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

docs: setup ## build the documentation's site, in work_dirs/docs/html
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	@PYTHONPATH=. $(PY) -m sphinx --quiet -b html docs work_dirs/docs/html $(ARGS)
	@echo work_dirs/docs/html/index.html

docs-check: ## the same from scratch; warnings, broken links and files from other hosts are errors
	@rm -rf work_dirs/docs docs/_pages
	@$(MAKE) --no-print-directory docs ARGS='--fail-on-warning --keep-going'
	@$(PY) tools/dev/check_site.py work_dirs/docs/html

clean: ## remove the environments, what runs have written, and the drawn data sets
	rm -rf .venv .venv-onedl .venv-latest work_dirs data/shapes* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
