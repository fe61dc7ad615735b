#!/usr/bin/env bash
# One study as a job of Slurm: Ray starts on all machines of the job, the study runs on the first, and Ray ends with it.
#
#   (umask 077; ray get-auth-token --generate > /dev/null)    once, in the environment of raydml
#   sbatch deploy/slurm.sh                                     in this checkout; the same command again goes on with the study
#   scancel --signal=TERM --batch JOB                          end it in order; a plain scancel costs the last minute of each trial
#
# Needs a checkout with its environment (.venv) and the home folder on storage that all machines share. How to browse the
# results: docs/cluster.md. Marked with CHANGE: what is yours to fill in.

#SBATCH --job-name=raydml
#SBATCH --nodes=2                 # CHANGE
#SBATCH --gpus-per-node=4         # CHANGE
#SBATCH --cpus-per-task=32        # CHANGE: the cores of a machine
#SBATCH --time=24:00:00           # CHANGE
#SBATCH --ntasks-per-node=1
# Ray's end on a machine (`ray stop`) is that of every Ray of this user there.
#SBATCH --exclusive
# Five minutes before the time is over, the study is ended in order, and the job goes back into the queue.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt

set -euo pipefail

study=(
    search_spaces/image_folder.yaml --name first  # CHANGE: the search space, the study's name
    --data-root /mnt/shared/images                # CHANGE
    --storage /mnt/shared/studies                 # CHANGE
    --set machine.gpus_per_trial=1
)

cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"
if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
    echo 'no token of Ray. Cure: (umask 077; ray get-auth-token --generate > /dev/null)' >&2
    exit 2
fi
# Machines that start within five minutes of each other join; Ray's own patience is 30 s.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$head:6379
folder=$(mktemp -d)  # on the first machine, where this script and the study run
trap 'rm -rf "$folder"' EXIT

# Ends the study's process in order. Slurm's own signal to all processes would end Ray's as well.
# shellcheck disable=SC2329 # called by the traps
end_study() {
    if [[ -s $folder/pid ]]; then kill -TERM "$(< "$folder/pid")" 2> /dev/null || true; else kill -TERM "$steps" || true; fi
}
again=false
trap end_study TERM
trap 'again=true; end_study' USR1

# On each machine `ray start`, on the first the study as well; the dashboard is on the first one's loopback interface.
# shellcheck disable=SC2016 # for the inner shell
srun --kill-on-bad-exit=1 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --dashboard-host=127.0.0.1 --disable-usage-stats -- \
    bash -c 'echo $$ > "$0"; exec "$@"' "$folder/pid" python launch.py sweep "${study[@]}" --address "$address" &
steps=$!

code=0
while true; do
    if wait "$steps"; then code=0; else code=$?; fi
    kill -0 "$steps" 2> /dev/null || break  # else a signal ended the wait, and not the study
done
if $again && ((code != 0)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
