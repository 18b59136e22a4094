"""Built-in server `code`: runs Python that agents write, which can call their other tools and nothing else."""
