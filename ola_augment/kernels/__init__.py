"""The built-in operations, a row each, and the kernels that run them; they know no spaces."""
