"""What people do with kernels besides calling them: explain, precompile, tune, measure."""
