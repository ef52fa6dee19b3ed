"""What a profile is worth: heads are silenced, and the answers counted."""
