"""What is made out of the files of finished runs."""
