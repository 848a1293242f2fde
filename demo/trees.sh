#!/usr/bin/env bash
# Trees from the air: sections 1 to 4 of docs/own_pictures.md, one after the other. Finished steps
# are repeated quickly, an interrupted training goes on.
set -euo pipefail
work=${1:-work_dirs/trees}
set -x
python tools/dataset_converters/trees.py
python tools/misc/new_config.py --force --out "$work/config.py" \
  --train data/trees/annotations/train.json data/trees/train \
  --val data/trees/annotations/val.json data/trees/val \
  --model retinanet --backbone fastervit-toy --flip horizontal vertical diagonal
python tools/train.py "$work/config.py" --work-dir "$work" --resume
python tools/test.py "$work/config.py" "$(cat "$work/last_checkpoint")" --work-dir "$work/test" \
  --show-dir pictures
python tools/analysis_tools/whole_and_tiles.py "$work/config.py" "$(cat "$work/last_checkpoint")" \
  --out "$work/whole_and_tiles"
