"""Whether the mesh changes the loss curve; see README.md."""
