"""The field's tasks: templates as data, rows, encoding, and scoring options by their likelihood."""
