"""What every room uses: files, teams of processes, statistics, numbers as people write them."""
