"""Step time of SigLIP B/16 on a CPU against the machine's own matrix-product peak and against transformers."""
