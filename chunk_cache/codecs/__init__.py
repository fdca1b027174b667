"""How the KV of a layer is stored below memory: as it is, or smaller and approximate. One file per codec."""
