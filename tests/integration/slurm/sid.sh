#!/bin/bash
# Debian sid in a folder, with its Slurm and a pyslurm built for that Slurm: where the tests of scheduler "pyslurm" run.
#
#   sid.sh make ROOT              make it, some minutes and 1 GB; does nothing where ROOT is there and made by this recipe
#   sid.sh run ROOT COMMAND ...   run a command there, in a copy of this working tree
#
# For root, with debootstrap and a way to Debian's mirror and PyPI (for "run" without: nothing is fetched then).  Mounts
# and processes of "run" end with it, whatever ends it: they live in namespaces of its own.
#
# PyPI has pyslurm for Slurm 25.11 only, and Debian has another release.  Their interfaces differ in what compat.h below
# says; with that and the version changed, pyslurm is what it would be for Debian's Slurm.  sid moves on: one day this no
# longer builds, and says so.
set -euo pipefail

RECIPE=1
PYSLURM=25.11.2
MIRROR=${EMFLOW_DEBIAN_MIRROR:-http://deb.debian.org/debian}
PACKAGES=ca-certificates,gcc,libc6-dev,libslurm-dev,python3-dev,python3-venv,slurm-client,slurmctld,slurmd
REPOSITORY=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../.." && pwd)

refuse() {
    echo "sid.sh: $1" >&2
    exit 69
}

# A command in the chroot $1, with none of our environment but the way to the network.
inside() {
    local root=$1 name ways=()
    shift
    for name in http_proxy https_proxy no_proxy PIP_INDEX_URL; do
        [[ -z ${!name:-} ]] || ways+=("$name=${!name}")
    done
    chroot "$root" /usr/bin/env -i PATH=/venv/bin:/usr/bin:/bin:/usr/sbin HOME=/root LANG=C.UTF-8 "${ways[@]}" \
        PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore "$@"
}

make_chroot() {
    local root=$1 new=$1.new
    [[ $(cat "$root/recipe" 2>/dev/null) != "$RECIPE" ]] || return 0
    rm -rf --one-file-system -- "$root" "$new"
    mkdir -p -- "$new"
    debootstrap --variant=minbase --include="$PACKAGES" sid "$new" "$MIRROR" || refuse "debootstrap fails"
    rm -rf -- "$new"/var/cache/apt/* "$new"/var/lib/apt/lists/*
    cp -- /etc/resolv.conf /etc/hosts "$new/etc/"
    # certificates of a proxy between us and the world are known to this machine only
    cp -- "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$new/etc/ssl/certs/ca-certificates.crt"
    mkdir -p -- "$new/emflow" "$new/build"
    cat >"$new/build/compat.h" <<'EOF'
#define SLURM_BACKWARD_COMPAT
#include <slurm/slurm.h>
#include <slurm/slurm_errno.h>
#define slurm_free_ctl_conf slurm_free_conf
#define ESLURM_ERROR_ON_DESC_TO_RECORD_COPY 2015
EOF
    # shellcheck disable=SC2016  # meant for the shell inside
    inside "$new" bash -euo pipefail -c '
        python3 -m venv /venv
        pip install -q Cython packaging setuptools wheel pytest pytest-timeout hypothesis
        cd /build
        pip download -q --no-deps --no-build-isolation --no-binary :all: "pyslurm==$1"
        tar xf pyslurm-*.tar.gz --strip-components=1
        version=$(slurmctld -V | sed -E "s/^slurm[^ ]* ([0-9]+[.][0-9]+).*/\1/")
        sed -i "s/^__version__ = .*/__version__ = \"$version.0\"/" pyslurm/version.py
        export CFLAGS="-O0 -g0 -w -include /build/compat.h" PYSLURM_BUILD_JOBS=2 SLURM_LIB_DIR=/usr/lib/$(gcc -print-multiarch)
        pip install --no-deps --no-build-isolation . >build.log 2>&1 || { grep -m 5 "error:" build.log >&2; exit 1; }
    ' bash "$PYSLURM" || refuse "pyslurm $PYSLURM can't be built for the Slurm of sid"
    rm -rf -- "$new/build"
    echo "$RECIPE" >"$new/recipe"
    mv -T -- "$new" "$root"
}

# In namespaces of our own.
run_inside() {
    local root=$1
    shift
    mount -t proc proc "$root/proc"
    mount --bind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    mount -t tmpfs tmpfs "$root/emflow"
    tar -C "$REPOSITORY" --exclude=./.git --exclude=./.venv --exclude=./build --exclude='*.so' --exclude='*.egg-info' \
        --exclude=__pycache__ -cf - . | tar -C "$root/emflow" -xf -
    # without the compiled kernels: they are not what is tested here
    inside "$root" env CC=false pip install -q --no-build-isolation -e /emflow >&2
    # not exec: process 1 of the namespace is the one that takes leave of orphans
    inside "$root" env -C /emflow "$@"
}

[[ $# -ge 2 && $2 == /* ]] || refuse "usage: sid.sh make|run ROOT [COMMAND ...]; ROOT is an absolute path"
[[ $(id -u) -eq 0 ]] || refuse "only root can make a chroot"
command -v debootstrap >/dev/null || refuse "debootstrap is not installed: apt-get install debootstrap"
# a folder that somebody else has prepared would be run as root
[[ ! -e $2 || -O $2 ]] || refuse "$2 belongs to somebody else"
case $1 in
    make)
        exec 9>"$2.lock"
        flock 9
        make_chroot "$2" 9>&-
        ;;
    run)
        exec unshare --mount --pid --fork --kill-child=KILL -- "$BASH" "${BASH_SOURCE[0]}" inside "${@:2}"
        ;;
    inside) run_inside "${@:2}" ;;
    *) refuse "no such command: $1" ;;
esac
