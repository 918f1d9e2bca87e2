#!/bin/bash
# Sourced by every job script of emflow: the site's set-up, the checks, and how the ranks are started.
#
# Slurm runs a copy of a job script from its spool folder, so a script can't find this file beside itself: EMFLOW_SITE
# says where it lies.  A script begins with these lines, and ends with set_up_site and start_ranks:
#
#   EMFLOW_SCRIPT=reduce.sbatch
#   site=${EMFLOW_SITE:-$(dirname -- "${BASH_SOURCE[0]}")/site.sh}
#   if [[ ! -f $site ]]; then echo "..."; exit 64; fi
#   source "$site"
#
# From the service, and from nobody else, since sbatch is started with nothing else in its environment:
#
#   EMFLOW_PYTHON     the Python that has mpi_kernels (in the container, if there is one)
#   EMFLOW_SETUP      the administrator's bash file: modules, paths; it may also set the variables of this list
#   EMFLOW_CONTAINER  an Apptainer image
#   EMFLOW_BIND, EMFLOW_BIND_RO   folders that the container sees, by colons; the second list can't be written to there
#   EMFLOW_MPI        srun --mpi
#   EMFLOW_GPUS_PER_RANK   cards of each rank, where sbatch does not say so itself (26.05)
#   EMFLOW_LAUNCHER, EMFLOW_RANKS, EMFLOW_TIME_LIMIT_S   without Slurm: an mpiexec, how many ranks, when to end them

set -euo pipefail

refuse() {
    echo "${EMFLOW_SCRIPT:-emflow}: $1" >&2
    exit 64
}

# A run folder as the service makes them, and nothing else.
check_run_folder() {
    [[ $1 =~ ^/(.*/)?[0-9a-f]{16}/[0-9]{2}$ ]] ||
        refuse "the argument is no absolute run folder .../<16 hex>/<2 digits>"
    [[ -f $1/job.json ]] || refuse "there is no job.json in the run folder; do the nodes see it under the same path?"
}

# What is run as code must be a file that not everybody may write to.
check_code() {
    [[ $2 == /* && -f $2 ]] || refuse "$1 is no file on $HOSTNAME, or no absolute path: $2"
    (((8#$(stat -Lc %a -- "$2") & 2) == 0)) || refuse "$1 can be written by everybody, so it is not run: $2"
}

run_setup() {
    # modules are not written for strict shells
    set +euo pipefail
    # shellcheck source=/dev/null
    source "$EMFLOW_SETUP"
    local status=$?
    set -euo pipefail
    [[ $status -eq 0 ]] || refuse "the set-up file ended with $status: $EMFLOW_SETUP ([slurm] setup)"
}

set_up_site() {
    if [[ -n ${EMFLOW_SITE:-} ]]; then check_code "site.sh (EMFLOW_SITE)" "$EMFLOW_SITE"; fi
    if [[ -n ${EMFLOW_SETUP:-} ]]; then
        check_code "the set-up file ([slurm] setup)" "$EMFLOW_SETUP"
        run_setup
    fi
    # Nothing that lies in the working directory may be imported.
    export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        ranks=${SLURM_NTASKS:-1}
        cores_per_rank=${SLURM_CPUS_PER_TASK:-1}
        # with sbatch --export=NAMES srun would pass on only those
        unset SLURM_EXPORT_ENV
    else
        ranks=${EMFLOW_RANKS:-1}
        cores_per_rank=$(($(nproc) / ranks))
    fi
    # One thread per core in all: libraries that start one thread per core on every rank slow each other down.
    local threads=$((cores_per_rank > 1 ? cores_per_rank : 1))
    export OMP_NUM_THREADS=$threads OPENBLAS_NUM_THREADS=$threads MKL_NUM_THREADS=$threads BLOSC_NTHREADS=$threads
    enter=()
    if [[ -n ${EMFLOW_CONTAINER:-} ]]; then enter_container; fi
    python=${EMFLOW_PYTHON:-python3}
}

enter_container() {
    [[ -e $EMFLOW_CONTAINER ]] ||
        refuse "the container is not there on $HOSTNAME: $EMFLOW_CONTAINER ([slurm] container)"
    local engine
    engine=$(type -P apptainer || type -P singularity) ||
        refuse "a container is asked for, but $HOSTNAME has no apptainer on PATH: load it in [slurm] setup"
    # Apptainer's own variables could bind more than is asked for.  /dev and /tmp stay the node's: MPI needs them.
    unset "${!APPTAINER@}" "${!SINGULARITY@}"
    enter=("$engine" exec --no-home --pwd /)
    if [[ -n ${gpus_per_rank:-} ]]; then enter+=(--nv); fi
    local folder folders=()
    # in this order: a folder that is bound later hides what lies below it, and runs/ may lie below the second list's
    IFS=: read -ra folders <<<"${EMFLOW_BIND_RO:-}"
    for folder in "${folders[@]}"; do
        [[ ! -d $folder ]] || enter+=(--bind "$folder:$folder:ro")
    done
    IFS=: read -ra folders <<<"${EMFLOW_BIND:-}"
    for folder in "${folders[@]}"; do
        [[ ! -d $folder ]] || enter+=(--bind "$folder")
    done
    enter+=("$EMFLOW_CONTAINER")
}

# Becomes the ranks: start_ranks MODULE ARGUMENT...
#
# Every way ends in exec, so that a signal for the job reaches the program.  sbatch --signal=USR1@60 (without "B:") is
# sent to the processes of the steps, which are the ranks, and not to this shell.
start_ranks() {
    # "python -m mpi4py" aborts all ranks when one raises; plain Python would leave the others waiting to the time limit
    local program=("${enter[@]}" "$python" -m mpi4py -m "$@")
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        local mpi=${EMFLOW_MPI:-pmi2}
        # The wrong one makes every rank a world of its own; mpi_kernels compares its world with SLURM_NTASKS.
        local flags=("--mpi=$mpi" --kill-on-bad-exit=1 --wait=5)
        # Since Slurm 22.05 srun does not take this over from sbatch by itself, and would bind each rank to one core.
        # Source: RELEASE_NOTES of 22.05, on SLURM_CPUS_PER_TASK
        if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then flags+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
        if [[ -n ${gpus_per_rank:-} ]]; then flags+=("--gpus-per-task=$gpus_per_rank"); fi
        type -P srun >/dev/null ||
            refuse "srun is not on PATH of $HOSTNAME: the service's PATH, or [slurm] setup, must name its folder"
        local known
        known=$(srun --mpi=list 2>&1) || refuse "srun --mpi=list: $known"
        known=${known//[^A-Za-z0-9_]/ }
        [[ $mpi =~ ^[a-z0-9_]+$ && " $known " == *" $mpi "* ]] ||
            refuse "srun on $HOSTNAME has no --mpi=$mpi ([slurm] mpi). It says: $known"
        exec srun "${flags[@]}" "${program[@]}"
    fi
    local limit=()
    if [[ -n ${EMFLOW_TIME_LIMIT_S:-} ]]; then limit=(timeout --kill-after=5 "$EMFLOW_TIME_LIMIT_S"); fi
    if [[ -n ${EMFLOW_LAUNCHER:-} ]]; then exec "${limit[@]}" "$EMFLOW_LAUNCHER" -n "$ranks" "${program[@]}"; fi
    [[ $ranks -eq 1 ]] || refuse "EMFLOW_RANKS is $ranks, but EMFLOW_LAUNCHER names no mpiexec"
    exec "${limit[@]}" "${enter[@]}" "$python" -m "$@"
}
