"""How kernels are compiled: into the loop over a batch, which alone Python calls and disk keeps."""

from numba import njit

#: What is divided by is never 0, or the kernel says what then. Wrappers would cost half the time.
kernel = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
#: Parts of a kernel that are written into it before anything else is done.
part = njit(inline="always")
