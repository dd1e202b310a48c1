"""The field's tasks: templates as data, rows, encoding, scoring options by their likelihood, generated answers."""
