"""What all command lines share: exit codes, one clean line per error, the terminal."""
