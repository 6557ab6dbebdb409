"""What every room stands on: specs, selection of modules, the linear-like registry, errors, atomic files, processes."""
