"""Claims as functions: the real tests call them, and the mutation tests show that they can fail."""
