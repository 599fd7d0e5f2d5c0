"""The command line. Hydra lives here and in config.py, nowhere else."""
