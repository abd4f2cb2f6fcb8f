#!/usr/bin/env bash
# Install the carried wheels on a GPU machine that has torch but no network, and run what was asked.
#
#   ci/gpu_run.sh [tests|sanitize|cpu|bench|cascade|scaling|demo]...    default: tests
#
# `nox -s bundle` makes the wheels; this script finds their index in the bundle it lies in, or in bundle/ of a checkout.
# Environment: OUT (folder for logs; default: a temporary one), PYTEST_ARGS (more arguments for pytest), INDEX_BUILD
# (directory of the index; default: cu130/torch2.11), DEMO_FILES (folder that was carried for the demo; default:
# build/carried). The last lines are a table of what ran; it exits 1 if any failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
python=$work/venv/bin/python
pytest=("$python" -m pytest -p no:cacheprovider -q)
out=${OUT:-$work/out}
mkdir -p "$out"
read -ra extra <<<"${PYTEST_ARGS:-}"
table=()
failed=0

# A venv made from a venv sees only the base Python, so the running one's packages (torch) are added by path.
install() {
  local index=$root/index purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  [[ -d $index ]] || index=$root/bundle/index
  python3 -m venv --without-pip "$work/venv"
  python3 -c "$purelib" >"$("$python" -c "$purelib")/parent.pth"
  python3 -m pip --python "$python" install -q --no-cache-dir --disable-pip-version-check \
    -i "file://$index/${INDEX_BUILD:-cu130/torch2.11}/" flashinfer-python
  "$python" -m flashinfer_core || true # the doctor; what it finds wrong, the tests will show
}

# part NAME COMMAND...: run it, keep its output, note how it ended.
part() {
  local name=$1 status=0 began=$SECONDS
  shift
  echo "== $name"
  (cd "$root" && "$@") 2>&1 | tee "$out/$name.log" || status=$?
  ((status == 0)) || failed=1
  table+=("$(printf '%-18s rc %-3d %5d s  %s' "$name" "$status" "$((SECONDS - began))" "$(tail -n 1 "$out/$name.log")")")
}

# Native code, then the code paths of older architectures: their PTX runs on the same GPU.
tests() {
  part tests-native "${pytest[@]}" -m gpu "${extra[@]}"
  FLASHINFER_CUDA_TARGET=compute_80 part tests-compute_80 "${pytest[@]}" -m gpu "${extra[@]}"
  FLASHINFER_CUDA_TARGET=compute_75 part tests-compute_75 "${pytest[@]}" -m gpu "${extra[@]}"
}

# Each kernel in each dtype and head dimension. Without torch's caching allocator every tensor is an allocation of its
# own, so a read past one is seen.
sanitize() {
  local memory='test_dtypes_and_head_dims or test_any_workspace_will_do or test_append_copies_any_dtype or test_ranks'
  local races='test_any_workspace_will_do or test_ranks'
  local -x PYTORCH_NO_CUDA_MEMORY_CACHING=1
  part memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "${pytest[@]}" -m gpu -k "$memory"
  part racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "${pytest[@]}" -m gpu -k "$races"
}

# The CPU kernels of this machine's processor, which may have instructions that the build machine lacks.
cpu() { part tests-cpu "${pytest[@]}" -m "not gpu" tests/test_cpu_targets.py; }

bench() { part bench "$python" -m benchmarks attention_gpu --write "$out/h100.md"; }

cascade() { part cascade "$python" -m benchmarks cascade --write "$out/cascade-h100.md"; }

scaling() { part scaling "$python" -m benchmarks scaling --write "$out/scaling-h100.md"; }

# Its packages and the pieces of its model are carried in a folder of their own: docs/gpu-testing.md says how.
demo() {
  local carried=${DEMO_FILES:-$root/build/carried}
  if [[ ! -d $carried ]]; then
    table+=("demo               not run: there is no $carried, see docs/gpu-testing.md")
    return
  fi
  python3 -m pip --python "$python" install -q --no-index --no-deps "$carried"/wheels/*.whl
  cat "$carried"/model.gguf.* >"$work/model.gguf"
  part demo "$python" docs/examples/chat_batch.py --model "$work/model.gguf" --work "$work" --no-progress
}

install
for asked in "${@:-tests}"; do
  case $asked in
  tests) tests ;;
  sanitize) sanitize ;;
  cpu) cpu ;;
  bench) bench ;;
  cascade) cascade ;;
  scaling) scaling ;;
  demo) demo ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
  esac
done
printf '%s\n' "${table[@]}" | tee "$out/summary.log"
exit "$failed"
