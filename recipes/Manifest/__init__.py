"""Any corpus that is given as manifests."""
