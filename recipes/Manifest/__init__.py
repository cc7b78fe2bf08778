"""Any corpus that comes as manifests."""
