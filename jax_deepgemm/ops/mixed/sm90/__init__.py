"""Mixed-input products on SM90."""
