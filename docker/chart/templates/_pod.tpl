{{/* The server's pod, shared by the Deployment and KServe's predictor. validate.yaml refuses what cannot work. */}}

{{- define "panotriton.pod" -}}
serviceAccountName: {{ include "panotriton.serviceAccount" . }}
automountServiceAccountToken: false
# Service links would set variables that look like settings.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "panotriton.graceSeconds" . }}
securityContext: {{- include "panotriton.podSecurity" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.spreadOver }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "panotriton.selector" $ | nindent 8 }}
{{- end }}
{{- with .Values.gpu.claimTemplate }}
resourceClaims:
  - {name: gpu, resourceClaimTemplateName: {{ . }}}
{{- end }}
{{- if eq .Values.repository.source "export" }}
initContainers:
  - name: export
    image: {{ .Values.repository.export.image }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    args: [--preset, {{ .Values.repository.export.preset }}, --output, /models{{ if eq (include "panotriton.gpu" .) "true" }}, --provider, cuda{{ end }}]
    securityContext: {{- include "panotriton.containerSecurity" . | nindent 6 }}
    resources:
      requests: {cpu: "1", memory: 4Gi}
      limits: {cpu: "4", memory: 16Gi}
    volumeMounts:
      - {name: models, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end }}
containers:
  - name: {{ ternary "kserve-container" "server" (and .Values.kserve.enabled (not .Pool)) }}
{{- include "panotriton.container" . | nindent 4 }}
volumes:
  # The default /dev/shm of a pod is 64 MiB. It counts as the container's memory.
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ .Values.shm.size }}}
  - name: tmp
    emptyDir: {sizeLimit: {{ add (include "panotriton.mebibytes" .Values.tmp.size) (include "panotriton.downloadMebibytes" .) }}Mi}
{{- include "panotriton.repositoryVolume" . | nindent 2 }}
{{- if and .Values.tls.secret (not .Pool) }}
  - name: tls
    secret: {secretName: {{ .Values.tls.secret }}, defaultMode: 0440}
{{- end }}
{{- with .Values.server.extraVolumes }}
{{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "panotriton.container" -}}
image: {{ include "panotriton.image" (mergeOverwrite (deepCopy .Values.image) (dict "tag" (.Values.image.tag | default .Chart.AppVersion))) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- with .Values.server.extraArgs }}
args: {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  - {name: http, containerPort: 8000}
  - {name: grpc, containerPort: 8001}
  - {name: metrics, containerPort: 8002}
  - {name: health, containerPort: 8003}
env: {{- include "panotriton.environment" . | nindent 2 }}
{{- if and (eq .Values.repository.source "s3") .Values.repository.s3.secret }}
envFrom:
  - secretRef: {name: {{ .Values.repository.s3.secret }}}
{{- end }}
# The supervisor answers: tritonserver calls a model ready whose process has died. ready: a new request would
# be answered. live: the supervisor works, which mends the server or ends the container by itself; loading has
# its own, longer limit.
startupProbe:
  httpGet: {path: /ready, port: health}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add .Values.startup.timeoutSeconds 4) 5 }}
readinessProbe:
  httpGet: {path: /ready, port: health}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /live, port: health}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
lifecycle:
  # Endpoints are removed while this sleeps: no new request meets a server that drains. SIGTERM comes after it; the
  # supervisor then waits for the groups in flight.
  preStop:
    sleep: {seconds: {{ .Values.shutdown.drainSeconds }}}
securityContext: {{- include "panotriton.containerSecurity" . | nindent 2 }}
resources:
  requests: {{- include "panotriton.resourceList" (dict "root" . "list" .Values.resources.requests) | nindent 4 }}
  limits: {{- include "panotriton.resourceList" (dict "root" . "list" .Values.resources.limits) | nindent 4 }}
    {{- if and .Values.gpu.count (not .Values.gpu.claimTemplate) }}
    {{ required "gpu.resource is empty; expected nvidia.com/gpu or a MIG slice, or gpu.count 0" .Values.gpu.resource }}: {{ .Values.gpu.count }}
    {{- end }}
  {{- if .Values.gpu.claimTemplate }}
  claims: [{name: gpu}]
  {{- end }}
volumeMounts:
  - {name: shm, mountPath: /dev/shm}
  - {name: tmp, mountPath: /tmp}
{{- include "panotriton.repositoryMount" . | nindent 2 }}
{{- if and .Values.tls.secret (not .Pool) }}
  - {name: tls, mountPath: /run/secrets/tls, readOnly: true}
{{- end }}
{{- with .Values.server.extraVolumeMounts }}
{{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "panotriton.environment" -}}
- {name: PANOTRITON_REPOSITORY, value: {{ include "panotriton.repositoryAddress" . | quote }}}
- {name: PANOTRITON_LOAD_MODELS, value: {{ if .Pool }}{{ join " " .Pool.models | quote }}{{ else }}{{ .Values.server.loadModels | quote }}{{ end }}}
{{- if and .Values.pools (not .Pool) }}
- {name: PANOTRITON_PLACE, value: {{ include "panotriton.placement" . | quote }}}
{{- end }}
- {name: PANOTRITON_MAX_REQUEST_BYTES, value: {{ int64 .Values.server.maxRequestBytes | quote }}}
- {name: PANOTRITON_EXIT_TIMEOUT_S, value: {{ .Values.shutdown.longestGroupSeconds | quote }}}
- {name: PANOTRITON_LOG_VERBOSE, value: {{ .Values.server.logVerbose | quote }}}
# Callers are in other pods: none of them shares this pod's memory.
- {name: PANOTRITON_CLIENT_SHM, value: "false"}
# With a GPU, networks that were all exported for the CPU are a mistake: the start fails.
- {name: PANOTRITON_GPU, value: {{ include "panotriton.gpu" . | quote }}}
{{- if and .Values.server.maxInflight (not .Pool) }}
- {name: PANOTRITON_MAX_INFLIGHT, value: {{ .Values.server.maxInflight | quote }}}
{{- end }}
# Threads by the limit; libraries would count the node's cores.
- name: OMP_NUM_THREADS
  valueFrom: {resourceFieldRef: {resource: limits.cpu}}
{{- with .Values.server.otlp }}
{{- if .url }}
- {name: PANOTRITON_OTLP_URL, value: {{ .url | quote }}}
- {name: PANOTRITON_TRACE_RATE, value: {{ .rate | quote }}}
{{- end }}
{{- end }}
{{- if and .Values.tls.secret (not .Pool) }}
- {name: PANOTRITON_TLS_FOLDER, value: /run/secrets/tls}
- {name: PANOTRITON_TLS_MUTUAL, value: {{ .Values.tls.mutual | quote }}}
{{- end }}
{{- if .Values.server.adminKeySecret }}
- {name: PANOTRITON_ADMIN_KEY_FILE, value: /run/secrets/panotriton/key}
{{- end }}
{{- if and (eq .Values.repository.source "s3") .Values.repository.s3.region }}
- {name: AWS_DEFAULT_REGION, value: {{ .Values.repository.s3.region | quote }}}
{{- end }}
{{- if and (eq .Values.repository.source "gcs") .Values.repository.gcs.secret }}
- {name: GOOGLE_APPLICATION_CREDENTIALS, value: /run/secrets/gcs/key.json}
{{- end }}
{{- with .Values.server.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "panotriton.repositoryVolume" -}}
{{- with .Values.repository }}
{{- if eq .source "pvc" }}
- name: models
  persistentVolumeClaim: {claimName: {{ .pvc.claimName }}, readOnly: true}
{{- else if eq .source "image" }}
- name: models
  image: {reference: {{ .image.reference }}, pullPolicy: {{ .image.pullPolicy }}}
{{- else if eq .source "export" }}
- name: models
  emptyDir: {sizeLimit: {{ .export.size }}}
{{- else if and (eq .source "gcs") .gcs.secret }}
- name: gcs
  secret: {secretName: {{ .gcs.secret }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- if .Values.server.adminKeySecret }}
- name: admin-key
  secret: {secretName: {{ .Values.server.adminKeySecret }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "panotriton.repositoryMount" -}}
{{- with .Values.repository }}
{{- if has .source (list "pvc" "image" "export") }}
- name: models
  mountPath: /models
  readOnly: true
{{- if and (eq .source "pvc") .pvc.subPath }}
  subPath: {{ .pvc.subPath }}
{{- end }}
{{- else if and (eq .source "gcs") .gcs.secret }}
- {name: gcs, mountPath: /run/secrets/gcs, readOnly: true}
{{- end }}
{{- end }}
{{- if .Values.server.adminKeySecret }}
- {name: admin-key, mountPath: /run/secrets/panotriton, readOnly: true}
{{- end }}
{{- end }}
