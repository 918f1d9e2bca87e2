#!/bin/bash
# Installs what the tests need from Debian or Ubuntu: strace, shellcheck, compilers, Slurm (its daemons are not started),
# debootstrap, and Python's venv and headers.  Safe to run again.
set -euo pipefail

missing=()
command -v strace >/dev/null || missing+=(strace)
command -v shellcheck >/dev/null || missing+=(shellcheck)
for daemon in slurmctld slurmd; do [[ -x /usr/sbin/$daemon ]] || missing+=("$daemon"); done
command -v sbatch >/dev/null || missing+=(slurm-client)
command -v debootstrap >/dev/null || missing+=(debootstrap)
command -v g++ >/dev/null || missing+=(g++)
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
python3 -c 'import pathlib, sysconfig; (pathlib.Path(sysconfig.get_path("include")) / "Python.h").stat()' 2>/dev/null \
    || missing+=(python3-dev)

if [[ ${#missing[@]} -eq 0 ]]; then
    echo "setup-debian: nothing is missing"
    exit 0
fi
if [[ $(id -u) -ne 0 ]]; then
    echo "setup-debian: missing: ${missing[*]}; as root: apt-get install ${missing[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
    # a fresh image has no package lists
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}
echo "setup-debian: installed ${missing[*]}"
