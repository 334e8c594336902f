"""What every room uses: arguments checked, sums in float64, torch as it is by default."""
