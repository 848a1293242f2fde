#!/usr/bin/env bash
# Nuclei under the microscope: Mask R-CNN for each of them, then UPerNet for all their pixels.
# Finished steps are repeated quickly, an interrupted training goes on.
set -euo pipefail
work=${1:-work_dirs/nuclei}
set -x
python tools/dataset_converters/nuclei.py
python tools/misc/new_config.py --force --out "$work/mask-rcnn/config.py" \
  --train data/nuclei/annotations/train.json data/nuclei/train \
  --val data/nuclei/annotations/val.json data/nuclei/val \
  --model mask-rcnn --backbone fastervit-toy --flip horizontal vertical diagonal --epochs 10
python tools/train.py "$work/mask-rcnn/config.py" --work-dir "$work/mask-rcnn" --resume
python tools/test.py "$work/mask-rcnn/config.py" "$(cat "$work/mask-rcnn/last_checkpoint")" \
  --work-dir "$work/mask-rcnn/test" --show-dir pictures
python tools/analysis_tools/whole_and_tiles.py "$work/mask-rcnn/config.py" \
  "$(cat "$work/mask-rcnn/last_checkpoint")" --tile 256 --out "$work/mask-rcnn/whole_and_tiles"
python tools/misc/new_config.py --force --out "$work/upernet/config.py" \
  --train data/nuclei/labels/train data/nuclei/train \
  --val data/nuclei/labels/val data/nuclei/val --classes data/nuclei/classes.txt \
  --model upernet --backbone fastervit-toy --flip horizontal vertical diagonal --epochs 12 \
  --scale 2
python tools/train.py "$work/upernet/config.py" --work-dir "$work/upernet" --resume
python tools/test.py "$work/upernet/config.py" "$(cat "$work/upernet/last_checkpoint")" \
  --work-dir "$work/upernet/test" --show-dir "$work/upernet/pictures"
