"""The method: which uses of parameters there were, and how each meets a reference gradient."""
