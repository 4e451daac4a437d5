"""What every part of the tool shares: errors, settings, files, console text, processes."""
