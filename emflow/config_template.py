"""The commented file that `emflow init` writes: every key with its default and why one would change it."""

from __future__ import annotations

_TEMPLATE = """\
# emflow's configuration.  Every key is shown with its default; relative paths belong to this file's folder.
# Look it over with: emflow check

[service]
state = "state"       # journal and lock; on a local disk, since its locks do not work on a share
runs = "runs"         # run folders; compute nodes must see them under the same path
results = "results"   # where finished results are copied to for people
experiments = "experiments"  # one folder with its log for each experiment of the agent

# One [[watch]] for each share.  It is only ever read.
[[watch]]
root = "incoming"     # folder that is watched, with everything below it
share = ""            # its name in ids and results; empty: the folder's name.  Never change it later
match = []            # patterns of files to take, such as "*.h5"; empty: the suffixes of all known formats
ignore = [".*", "*.tmp", "*.part"]  # patterns of files to leave alone; they win over match
recipe = "default"    # name of a built-in recipe, or the path of a TOML file

[scan]
active_s = 0.5        # folders where something is being written are read this often
recent_s = 3.0        # folders where something was written lately
whole_s = 15.0        # everything; bounds how late a file is noticed when the system gives no hints
settle_s = 1.0        # rest before a file is believed whose format knows its own end
stable_s = 5.0        # rest before a file is believed whose format does not
stall_s = 60.0        # incomplete and unchanged for this long: stalled; goes on by itself if it changes
quarantine_s = 3600.0 # incomplete and unchanged for this long: set aside for a person
hints = "auto"        # auto, inotify or none; hints only make a scan happen sooner

[transfer]
stage = "copy"        # copy: work on a verified copy; none: read on the share itself (nodes must see it)
workers = 2           # copies at the same time
min_free = "1 GiB"    # wait rather than fill the disk of the run folders further than this

[scheduler]
use = "local"         # who runs the jobs; local: this machine through mpiexec
ranks = 2             # MPI ranks of a job
max_active = 1        # jobs at the same time
time_limit_s = 3600   # a job is stopped after this
attempts = 3          # tries before a person is asked
poll_s = 0.2          # how often the jobs are looked at
silent_s = 600.0      # a job that is said to run and shows no sign of life for this long is ended, and tried again

# What jobs ask Slurm for (use = "slurm", "pyslurm" or "pool").  Empty and 0: left to the site's profile, then to Slurm.
[slurm]
site = "generic"      # generic, workstation, perlmutter, frontier, or the path of a profile of your own
account = ""          # who pays
partition = ""
qos = ""
constraint = ""       # such as "cpu"
reservation = ""
nodes = 0             # 0: as many as the ranks need
cpus_per_rank = 0
gpus_per_rank = 0
memory = 0            # of each node, such as "16 GiB"
mpi = ""              # srun --mpi; the wrong one starts worlds of one rank, which every job checks
python = ""           # interpreter on the nodes that has mpi_kernels; empty: this one
setup = ""            # bash file that the job scripts source first: modules, paths
container = ""        # Apptainer image that has mpi_kernels
flags = []            # more flags for sbatch, such as "--licenses=scratch"
warn_s = 60           # a job is told this long before its time is up, and leaves what it has

# Ranks that are kept warm (use = "pool").
[pool]
launcher = "slurm"    # slurm: one long job holds them; mpiexec: over hosts, without Slurm
folder = "pool"       # where the pools are written down; the nodes must see it
count = 1             # pools at the same time
hosts = []            # for mpiexec; empty: this machine
walltime_s = 3600     # of a pool; its successor takes over before it ends
relay_s = 300.0       # so long before the end the successor is asked for
nap_ms = 0.5          # of an idle rank; shorter is sooner, and costs more of a core
reach = "auto"        # how tasks get there: tcp, spool (files), or auto: files where TCP does not get through

# How much of the allocation may be spent.  0: without bound.
[caps]
node_hours_per_day = 0.0
node_hours_per_experiment = 0.0
degrade_at = 0.8      # from this part of a cap on, jobs take the recipe below
degraded = ""         # a cheaper recipe; empty: none.  At the cap jobs wait, and nothing is dropped
backlog = 0           # more acquisitions than this waiting: the agent is asked to hold its next one

# How jobs compute.  No result depends on it.
[kernels]
device = "cpu"        # gpu: one GPU per rank; a node without one takes its CPU, and the result says so
kernel = "auto"       # auto: the best this processor has; numpy, portable, avx2 or avx512
reading = "auto"      # auto: by what is cached, and where; mmap, read, direct (O_DIRECT) or source (the format's own)
threads = 0           # of each rank; 0: the cores of the node, divided by its ranks

# The control plane: only needed where results steer a microscope (emflow agent).
[microscope]
address = "127.0.0.1:7763"  # where its server listens (emflow microscope serve)
share = ""            # the share that it writes to; empty: the first one
patience_s = 60.0     # how long a cut connection is waited for

[agent]
mode = "propose"      # observe, propose, approve (asks before each decision is carried out) or auto
address = "127.0.0.1:0"  # where the agent listens for pause, resume, approve, stop; port 0: any free one
max_acquisitions = 20 # an experiment ends after this many; here and below 0 means without bound
max_dose_e = 0.0      # electrons on the specimen
max_time_s = 0.0      # seconds
no_improvement = 4    # decisions in a row that do not come nearer to the target
result_timeout_s = 600.0  # how long a result is waited for before the experiment fails

[log]
level = "info"        # debug, info, warning or error
json = false          # one JSON object a line, for machines
"""


def template() -> str:
    """Text of a configuration that loads as it is and has only defaults."""
    return _TEMPLATE
