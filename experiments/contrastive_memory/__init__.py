"""How much temporary memory the ring of the contrastive losses needs; see README.md."""
