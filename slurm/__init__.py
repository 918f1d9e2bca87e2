"""Job scripts that ship with emflow, installed as the package ``emflow.slurm``."""
