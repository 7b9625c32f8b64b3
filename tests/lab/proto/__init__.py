"""CRI's messages and stubs, generated from the .proto file here by `make proto`."""
