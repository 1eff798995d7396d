// Check custom resources against the definitions of their operators: node validate_custom.mjs MODELS < resources.json
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const places = {
  PodMonitor: "prometheus-operator/monitoring.coreos.com/v1/PodMonitor.js",
  ScaledObject: "keda/keda.sh/v1alpha1/ScaledObject.mjs",
  TriggerAuthentication: "keda/keda.sh/v1alpha1/TriggerAuthentication.mjs",
};
for (const resource of JSON.parse(readFileSync(0, "utf8"))) {
  const file = join(process.argv[2], "node_modules/@kubernetes-models", places[resource.kind]);
  const Model = (await import(pathToFileURL(file)))[resource.kind];
  const model = new Model(resource);
  if (model.apiVersion !== resource.apiVersion) throw new Error(`${resource.kind} is not of ${resource.apiVersion}`);
  model.validate();
}
