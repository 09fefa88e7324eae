"""Recipe -> plan -> stage processes -> artifacts. Never imports torch."""
