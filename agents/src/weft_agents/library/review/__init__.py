"""A review of Python code by three agents: a surveyor, analysts and an editor. No model is needed."""
