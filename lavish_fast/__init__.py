"""LAVISH: a frozen vision transformer that reads video and sound through latent-token adapters."""
