"""containerd's protocol for snapshotters: the .proto files, and the modules that `make proto` made from them."""
