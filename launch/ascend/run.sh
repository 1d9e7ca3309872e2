#!/usr/bin/env bash
# Starts the training job, or another job, on all cards of one Ascend machine or
# of several.
#
#   one machine, 8 cards:
#   vocab-parallel-ce ascend --tp 8
#
#   two machines, this one the first, then the second:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 vocab-parallel-ce ascend --tp 8
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 vocab-parallel-ce ascend --tp 8
#
#   the check of all cards:
#   JOB=doctor vocab-parallel-ce ascend --selftest
#
# In a clone that is not installed, launch/ascend/run.sh is the same. Options go
# to the job: `vocab-parallel-ce train --help` tells those of the training.
# Ranks that split a vocabulary are neighbours: with --tp 8 it is split inside a
# machine, and only gradients travel between machines (dp is what remains, 2 for
# two machines). With `--device cpu` and NPROC=2 it runs anywhere.
#
# Variables, all optional on one machine, with their defaults:
#   NPROC         processes, one a card, on each machine (8)
#   NNODES        machines (1)
#   NODE_RANK     which one this is, from 0 on
#   MASTER_ADDR   address of machine 0, as all machines reach it
#   MASTER_PORT   port on machine 0, for this script and then torchrun (29500)
#   WAIT_SECONDS  how long machines wait for each other (600)
#   IFNAME        network interface between the machines, such as eth0. Set it
#                 where hosts have more than one: HCCL and Gloo each pick one by
#                 themselves, and not always the right one
#   MAX_RESTARTS  how often a failed run starts again from its last checkpoint (0)
#   JOB           what to run (train), a job of `vocab-parallel-ce --help`
#   MODULE        or any other module (vocab_parallel_ce.launch.train)
#   PYTHON        interpreter of the environment (python3)
#   SET_ENV       CANN's script of variables
#                 (/usr/local/Ascend/ascend-toolkit/set_env.sh)
#   ASCEND_RT_VISIBLE_DEVICES   cards to use, such as 0,1,2,3; NPROC must fit
#
# Exit status: 2 and one line if it cannot start, else that of torchrun.
set -euo pipefail

for argument in "$@"; do
    case $argument in
    -h | --help)
        sed -n '2,${/^#/!q;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    esac
done

export NPROC=${NPROC:-8} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK-} MASTER_ADDR=${MASTER_ADDR-}
export MASTER_PORT=${MASTER_PORT:-29500} WAIT_SECONDS=${WAIT_SECONDS:-600}
python=${PYTHON:-python3}
job=${JOB:-train}
set_env=${SET_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}

device=""
previous=""
for argument in "$@"; do
    case $previous in --device) device=$argument ;; esac
    case $argument in --device=*) device=${argument#*=} ;; esac
    previous=$argument
done
if [[ -z $device ]]; then
    device=npu
    set -- --device npu "$@"
fi

if [[ $device == npu ]]; then
    # It sets ASCEND_HOME_PATH, so that tells whether it was sourced. It reads unset variables.
    if [[ -z ${ASCEND_HOME_PATH-} && -f $set_env ]]; then
        set +u
        # shellcheck source=/dev/null
        source "$set_env"
        set -u
    fi
    # Columns of -inf (padding, masks) must stay -inf; the other mode turns them into finite numbers.
    export INF_NAN_MODE_ENABLE=${INF_NAN_MODE_ENABLE:-1}
    # HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT follow the job's --timeout unless they are set.
fi
if [[ -n ${IFNAME-} ]]; then
    export HCCL_SOCKET_IFNAME=${HCCL_SOCKET_IFNAME:-=$IFNAME} # without = it would be a prefix
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$IFNAME}
fi
# Processes share the host's cores; torchrun would set the same, with a warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A clone need not be installed. What is installed needs no path, and the package's own folder must
# never be one: its files would hide modules of Python.
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")" && cd -P ../.. && pwd)
if [[ -f $clone/pyproject.toml && -d $clone/vocab_parallel_ce ]]; then
    export PYTHONPATH=$clone${PYTHONPATH:+:$PYTHONPATH}
fi

if ! command -v "$python" >/dev/null; then
    echo "vocab-parallel-ce ascend: PYTHON=$python is not found; name the environment's interpreter" >&2
    exit 2
fi
# Its own line says what is wrong: torch's warnings of every attempt to connect are left out.
TORCH_CPP_LOG_LEVEL=FATAL "$python" -m vocab_parallel_ce.launch.ascend.meet "$device" "$job" || exit 2

program=(vocab_parallel_ce.launch "$job")
if [[ -n ${MODULE-} ]]; then program=("$MODULE"); fi
where=(--standalone)
if [[ $NNODES != 1 ]]; then
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
        --master-port "$MASTER_PORT" --rdzv-conf "timeout=$WAIT_SECONDS")
fi
# As `torchrun` itself starts it; `-m torch.distributed.run` warns, because torch_npu imports it too.
exec "$python" -c 'from torch.distributed.run import main; main()' \
    "${where[@]}" --nproc-per-node "$NPROC" \
    --max-restarts "${MAX_RESTARTS:-0}" -m "${program[@]}" "$@"
