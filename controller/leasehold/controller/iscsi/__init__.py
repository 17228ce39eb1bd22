"""LUNs reached over iSCSI, by the system's libiscsi."""
