"""Images per second of the loader beside torch.utils.data with Pillow."""
