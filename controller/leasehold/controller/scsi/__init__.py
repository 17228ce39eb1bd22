"""What is SCSI, whatever carries it: commands, what a target answers, and persistent reservations."""
