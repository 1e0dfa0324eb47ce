"""A family of one elementwise op, as small as one can be: y[m, k] = x[m, k] * w[k].

It is registered by one line (`jax_deepgemm.tools.registry.FOLDERS`), and gets `config=`, `num_sms=`, tuning
files, `explain`, `precompile`, `tune`, `bench` and a case for compute-sanitizer from that.
"""
