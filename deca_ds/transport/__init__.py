"""Messages between ranks of different clients: over MPI, gloo or threads, with checksums and an edge test."""
