draw(JSON.parse(byId("data").textContent).figures);
