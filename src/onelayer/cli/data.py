"""What commands say of the option `--data`."""

DATA = "a file or folder of text, hf:owner/name of Hugging Face, or a folder made by onelayer tokenize"
