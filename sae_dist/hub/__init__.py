"""Folders of files on the Hugging Face Hub, or on a server that speaks its protocol (HF_ENDPOINT)."""
