"""Process supervision of one mesh on one machine: what `mesh up` runs."""
