"""containerd's protocol for its clients: the .proto files, and the modules that `make proto` made from them."""
