#!/usr/bin/env bash
# Checks the backbones on a GPU and measures them beside timm's, in at most nine minutes:
#
#   tools/dev/gpu_check.sh [--wheels DIR] [--out DIR] [--device cuda|cpu] [--quick] [--minutes 9]
#
# The machine needs Python 3.11 or later ($PYTHON, by default python3) with torch 2.6 or later,
# numpy, pillow and, for timm, torchvision; but no network. Without a C compiler, torch.compile is
# left out, without timm its networks are. Packages that are missing are installed from --wheels
# into a folder that is removed in the end; gpu_check.txt lists them and says how to fetch them.
# Python's own environment is not changed.
set -euo pipefail

started=$(date +%s)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
list=$root/tools/dev/gpu_check.txt
python=${PYTHON:-python3}
wheels=
words=()
while (($#)); do
  case $1 in
    --wheels)
      wheels=${2:?--wheels needs a folder}
      shift
      ;;
    --wheels=*) wheels=${1#*=} ;;
    *) words+=("$1") ;;
  esac
  shift
done
if [[ -n $wheels && ! -d $wheels ]]; then
  echo "gpu_check.sh: --wheels $wheels is no folder" >&2
  exit 2
fi

# The requirements that the machine does not meet. OpenCV can be there and lack system libraries.
missing=$("$python" - "$list" <<'EOF'
import importlib.util, sys

if sys.version_info < (3, 11):
    sys.exit(f'gpu_check.sh: {sys.executable} is Python {sys.version.split()[0]}; hat_mm needs '
             '3.11 or later; PYTHON=/path/to/python names another')
found = importlib.util.find_spec
absent = [name for name in ('torch', 'numpy', 'PIL') if found(name) is None]
if absent:
    sys.exit(f'gpu_check.sh: {sys.executable} has no {", ".join(absent)}, which the '
             'machine has to bring')
try:
    import cv2
except ImportError:
    cv2 = None
for line in open(sys.argv[1]):
    requirement, _, module = line.rstrip().partition('  # ')
    if module and (found(module) is None or (module == 'cv2' and cv2 is None)):
        print(requirement)
EOF
)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [[ -n $missing && ($missing != timm==* || -n $wheels) ]]; then
  if [[ -z $wheels ]]; then
    echo "gpu_check.sh: $python lacks" $missing "and there is no --wheels DIR;" \
      "$list says how to fetch them" >&2
    exit 2
  fi
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --target "$site" --find-links "$wheels" $missing
fi

path=$root:$root/tests:$root/tools/analysis_tools/benchmark:$site
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} TORCHINDUCTOR_CACHE_DIR=$site/inductor \
  "$python" "$root/tools/dev/gpu_check.py" --started "$started" ${words[@]+"${words[@]}"}
