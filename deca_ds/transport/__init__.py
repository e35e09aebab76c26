"""Messages between ranks of different clients over MPI, gloo or threads, and who sends which elements to whom."""
