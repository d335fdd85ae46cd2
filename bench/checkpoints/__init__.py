"""How long ``spectral-kernels inspect`` takes beside reading the files, SVDs and WeightWatcher."""
