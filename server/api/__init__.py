"""The HTTP routes: one router a resource, its wire models beside it; no decision of the engine is taken here."""
