#!/bin/bash
# Starts one run on all workers of a Cloud TPU VM, with gcloud (https://cloud.google.com/sdk).
#
#   export TPU_NAME=pseudoseg ZONE=us-central2-b
#   launch/tpu_vm.sh create --accelerator-type=v4-32 --version=tpu-ubuntu2204-base
#   launch/tpu_vm.sh install
#   launch/tpu_vm.sh run --config=configs/voc.py:recipe=cps,split=92 --workdir=W --config.data.root=DIR
#
#   create ...   makes the TPU; everything after it goes to `gcloud compute tpus tpu-vm create`, --spot or --network=NAME say
#   install      copies this checkout to every worker and installs it there; again after a change
#   run ...      starts `python -m pseudoseg_jax.main --distributed ...` on every worker; it goes on when the connection ends
#   logs         the newest lines of worker 0, and for each worker whether it runs, or what it ended with
#   stop         SIGTERM to every worker: all save at the same step and leave, with exit code 143
#   delete       deletes the TPU; what is not in the workdir is lost
#
# Stop:   launch/tpu_vm.sh stop
# Resume: the same `run` command; after a preemption of a --spot TPU: delete, create, install and run.
#
# To fill in: name and zone above; config, workdir and data root, which must be paths that all workers see: a Filestore share
# mounted on each of them for the workdir; for data a bucket mounted with gcsfuse will do.

set -euo pipefail

# On each worker, in the home folder:
LOG=pseudoseg.log  # output, of all runs
PID=pseudoseg.pid  # the process of the newest one
PYTHON=pseudoseg_env/bin/python

usage() {
  sed -n '2,/^$/{s/^# \{0,1\}//;p}' "$0"
  exit "$1"
}

tpu() {  # tpu SUBCOMMAND ...: of gcloud, on this TPU
  local subcommand=$1
  shift
  gcloud compute tpus tpu-vm "$subcommand" "$@" --zone="$ZONE"
}

on_workers() {  # on_workers WHICH COMMAND: in the home folder of worker WHICH, or of all
  tpu ssh "$TPU_NAME" --worker="$1" --command="$2"
}

command=${1:-}
case $command in
  create | install | run | logs | stop | delete) shift ;;
  "" | -h | --help | help) usage 0 ;;
  *) echo "error: unknown command $command" >&2 && usage 2 >&2 ;;
esac
if [ -z "${TPU_NAME:-}" ] || [ -z "${ZONE:-}" ]; then
  echo "error: say which TPU: export TPU_NAME=NAME ZONE=ZONE" >&2
  exit 2
fi
if [ "$command" != create ] && [ "$command" != run ] && [ $# -gt 0 ]; then
  echo "error: $command takes no arguments, got: $*" >&2
  exit 2
fi

case $command in
  create)
    tpu create "$TPU_NAME" "$@"
    ;;

  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    tar --create --gzip --file="$archive" --exclude=__pycache__ --directory="$(dirname "$0")/.." \
      pyproject.toml README.md LICENSE configs launch pseudoseg_jax
    tpu scp "$archive" "$TPU_NAME:pseudoseg.tar.gz" --worker=all
    # uv brings a Python of its own: that of the TPU's image may be too old.
    on_workers all "set -e
rm -rf pseudoseg_jax && mkdir pseudoseg_jax && tar --extract --gzip --file=pseudoseg.tar.gz --directory=pseudoseg_jax
python3 -m pip install --quiet --user uv
[ -x $PYTHON ] || python3 -m uv venv --quiet --python=3.12 pseudoseg_env
python3 -m uv pip install --quiet --python=$PYTHON --editable './pseudoseg_jax[tpu]'"
    ;;

  run)
    [ $# -gt 0 ] || usage 2 >&2
    run=$(printf '%q ' "../$PYTHON" -m pseudoseg_jax.main --distributed "$@")
    # A shell around the run notes how it ended; both outlive the connection, since they do not hear when it hangs up.
    job="$run & echo \$! > ../$PID; wait \$!; echo \"ended with exit code \$?\""
    on_workers all "if kill -0 \$(cat $PID 2>/dev/null) 2>/dev/null; then
  echo 'error: a run is going on here: stop it first' >&2
  exit 1
fi
cd pseudoseg_jax
trap '' HUP
PYTHONUNBUFFERED=1 bash -c $(printf '%q' "$job") >> ../$LOG 2>&1 < /dev/null &
echo started"
    ;;

  logs)
    on_workers 0 "tail -n 40 $LOG"
    on_workers all "if kill -0 \$(cat $PID 2>/dev/null) 2>/dev/null; then echo running; else tail -n 1 $LOG; fi"
    ;;

  stop)
    on_workers all "kill -TERM \$(cat $PID) && echo 'told to save and leave: see launch/tpu_vm.sh logs'"
    ;;

  delete)
    tpu delete "$TPU_NAME"
    ;;
esac
